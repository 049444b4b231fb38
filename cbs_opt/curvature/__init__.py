"""From network and data to gradient rows and layer inputs."""
