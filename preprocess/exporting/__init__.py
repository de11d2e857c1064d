"""Raw data sets in layouts of other tools."""
