"""How a model is run: device, batches, memory, loading, several processes, layer by layer."""
