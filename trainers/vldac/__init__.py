"""Training of vision-language agents in Gymnasium worlds (VL-DAC, arXiv 2508.04280)."""
