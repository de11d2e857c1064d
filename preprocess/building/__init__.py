"""From a raw folder to a published store, alone or shared by several processes."""
