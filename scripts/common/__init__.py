"""What all commands share: where things are, how they speak, what the machine is."""
