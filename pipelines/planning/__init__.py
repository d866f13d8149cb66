"""What a run will take, before it is paid for: memory, disk, traffic, tokens, hours and money, by stage."""
