"""Raw data sets become immutable shard stores. No torch in this room."""
