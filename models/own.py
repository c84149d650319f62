"""Networks of your own, which neither PaddleClas nor timm has: a function each, whose name the settings then take.

    import torchvision
    from timm.models import register_model

    @register_model
    def my_mobilenet(pretrained=False, num_classes=1000, **kwargs):
        return torchvision.models.mobilenet_v3_small(num_classes=num_classes)

It gives a module whose `forward` turns normalised pixels (B, 3, H, W) into logits (B, num_classes), or into a dict, an
object or a tuple that has them, as `logits` or first.

- Its last nn.Linear, in the order of construction, is taken for the layer that makes the logits. Where another module
  makes them, a method `get_classifier` returns it.
- Tensors are parameters or buffers, and what it does does not depend on values of pixels, so that it can be exported.
- A weight that it has frozen (`requires_grad_(False)`) stays as it is; BatchNorm's statistics move all the same.
- Memory is channels-last: `flatten(1)` or `reshape`, not `view`.
- With several processes every parameter has to have a part in the logits: no auxiliary classifiers.
- For weights of its own, an attribute `pretrained_cfg`, a dict of `mean` and `std`, says how pixels are normalised. Of
  a teacher that is taken as it is, the settings may say it.

All of its code is in this file, or installed. DVC sees this file change, and runs the stages again that have networks.
"""
