"""Studies: a grid of runs as a tree of shared trunks, trained by any number of workers, collected, fitted, reported."""
