"""What is handed over to those without segfleet: graphs, bundles, model cards."""
