"""Networks: a name and options become an `nn.Module`. Single-device code only; imports nothing else
of segfleet."""
