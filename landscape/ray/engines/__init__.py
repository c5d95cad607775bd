"""Each way to evaluate a ray."""
