"""What is wanted, and what it will take: recipes, schemes and forecasts, all before any work."""
