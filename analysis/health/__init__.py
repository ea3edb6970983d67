"""How the runs went: gates, stopping rules, health of the recurrent states, the GPU."""
