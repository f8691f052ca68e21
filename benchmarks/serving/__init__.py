"""What serving many adapters costs: speed, memory, load and endurance, beside its peers."""
