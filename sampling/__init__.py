"""The mathematics of drawing: noise levels, observations, the teacher's solver, one random stream per image."""
