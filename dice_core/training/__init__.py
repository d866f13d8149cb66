"""DPO training: the job, what each of its processes does, and the model that comes out."""
