"""What an optimizer keeps: groups and clocks, the forms of y, x and z, the two modes, and its state dict."""
