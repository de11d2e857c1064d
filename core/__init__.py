"""What every room needs and nobody owns: errors, files, the machine, parallel work."""
