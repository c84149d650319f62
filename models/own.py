"""Networks of your own, which neither PaddleClas nor timm has: a function each, whose name the settings then take.

    import torchvision
    from timm.models import register_model

    @register_model
    def my_mobilenet(pretrained=False, num_classes=1000, **kwargs):
        return torchvision.models.mobilenet_v3_small(num_classes=num_classes)

It gives any module whose `forward` turns normalised pixels (B, 3, H, W) into logits (B, num_classes), or into a dict,
an object or a tuple that has them, as `logits` or first. Its last nn.Linear is taken for its classifier, unless a
method `get_classifier` names another module. An attribute `pretrained_cfg`, a dict of `mean` and `std`, says how pixels
are normalised for weights of its own; settings may say it, too. Use `flatten(1)`, not `view`: memory is channels-last.

All of its code stands in this file, or is installed. DVC sees this file change, and runs the stages again that have
networks.
"""
