"""A recipe for a store, a device and a budget of time."""
