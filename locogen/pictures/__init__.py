"""Pictures of a plan: made in batches, kept in a store, scored."""
