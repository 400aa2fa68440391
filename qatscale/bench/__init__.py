"""`qatscale bench`: what this code costs on this machine, beside what does the same elsewhere."""
