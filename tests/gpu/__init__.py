"""What only a GPU can show, by one command within ten minutes: `make test-gpu`."""
