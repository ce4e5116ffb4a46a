"""What a run does beside training: averages, pictures, figures. Named by configs only."""
