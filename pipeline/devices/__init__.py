"""What the machine computes with: its driver, its compiler, its precision, its memory."""
