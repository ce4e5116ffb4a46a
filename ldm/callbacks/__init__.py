"""What a run does beside training: averages, images, figures. Named by configs only."""
