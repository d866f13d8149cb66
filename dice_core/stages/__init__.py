"""The stages: one file each, and the runner that skips, resumes or refuses."""
