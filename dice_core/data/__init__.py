"""The user's rows and the tables of a run: schemas, sources, preparing, decontamination, and prompts as token ids."""
