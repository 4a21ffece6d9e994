"""Attribution: what each layer, step and token adds to the target's pull, by gradients."""
