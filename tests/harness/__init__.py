"""What several tests and benchmarks share: worlds, clients, references, adapters, plugins."""
