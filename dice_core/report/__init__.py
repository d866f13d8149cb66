"""What a run made, as a page for people, a table for a terminal, and numbers for programs."""
