"""The DICE pipeline, its presets, and the commands that compile and run it."""
