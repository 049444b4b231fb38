"""Layer programs: the joint program of every row of a weight matrix, over one Gram matrix of its inputs."""
