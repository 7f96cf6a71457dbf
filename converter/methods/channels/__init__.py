"""Methods that skip input channels of linear maps."""
