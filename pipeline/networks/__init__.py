"""U-Net and SDNet."""
