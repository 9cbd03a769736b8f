"""Pictures of attention, and those of the folder figures/."""
