"""Two processes and a link: the server, the device, what they say to each other, and a relay."""
