"""Arrays in, numbers out: least squares, adjusted p-values, power, resampling. Nothing here reads files."""
