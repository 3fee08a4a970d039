"""Foreign checkpoints -> this layout: one module per layout, each loaded whole or refused with a reason."""
