"""What a run will need, before it is started: memory, time and traffic of a configuration on GPUs that are not here."""
