"""NCVSD on a mixture of Gaussians in the plane, where teacher and posterior are known exactly."""
