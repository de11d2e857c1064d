"""The front door: one small file per command. Nothing imports this room."""
