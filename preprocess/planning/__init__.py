"""Pure functions from facts to a plan and to splits."""
