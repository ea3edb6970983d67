"""Training one model: loop, optimiser groups, schedule, evaluation, checkpoints."""
