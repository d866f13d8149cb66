"""Commands that are no stages: a person's own steps with what runs have made. One file a command."""
