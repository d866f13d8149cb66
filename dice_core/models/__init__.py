"""Models as folders of safetensors: found, imported, fetched once, loaded, saved."""
