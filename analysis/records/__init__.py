"""Reading what runs, sweeps and their configurations left behind: nothing here computes or draws."""
