"""The only room that knows the others: one mutable world, one writer."""
