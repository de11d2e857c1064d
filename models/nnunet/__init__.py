"""nnU-Net's two U-Nets, planned from patch and spacing."""

from segfleet.models.nnunet import plain_unet as plain_unet
from segfleet.models.nnunet import resenc_unet as resenc_unet
