# Everything in AWS for encrypted instance stores with nbdcrypt: a KMS key, a bucket for the secret's ciphertext, a role, and
# a launch template. After `terraform apply`, `nbdcrypt provision` makes the secret, once. See docs/aws.md.

terraform {
  required_version = ">= 1.3"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0"
    }
  }
}

data "aws_partition" "current" {}

data "aws_caller_identity" "current" {}

data "aws_iam_role" "provisioner" {
  name = var.provisioner_role
}

data "aws_iam_policy_document" "trust" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.${data.aws_partition.current.dns_suffix}"]
    }
  }
}

resource "aws_iam_role" "instance" {
  name_prefix        = "nbdcrypt-"
  description        = "Unlocks the nbdcrypt volume ${var.name}"
  assume_role_policy = data.aws_iam_policy_document.trust.json
}

resource "aws_iam_instance_profile" "instance" {
  name_prefix = "nbdcrypt-"
  role        = aws_iam_role.instance.name
}

data "aws_iam_policy_document" "key" {
  # Administrators of the account manage the key. They do not use it.
  statement {
    sid = "AdministerKey"
    actions = [
      "kms:CreateAlias",
      "kms:Describe*",
      "kms:Enable*",
      "kms:List*",
      "kms:Put*",
      "kms:Update*",
      "kms:Revoke*",
      "kms:Disable*",
      "kms:Get*",
      "kms:Delete*",
      "kms:TagResource",
      "kms:UntagResource",
      "kms:ScheduleKeyDeletion",
      "kms:CancelKeyDeletion",
      "kms:RotateKeyOnDemand",
      "kms:ImportKeyMaterial",
    ]
    resources = ["*"]
    principals {
      type        = "AWS"
      identifiers = ["arn:${data.aws_partition.current.partition}:iam::${data.aws_caller_identity.current.account_id}:root"]
    }
  }
  statement {
    sid       = "UnlockVolume"
    actions   = ["kms:Decrypt"]
    resources = ["*"]
    principals {
      type        = "AWS"
      identifiers = [aws_iam_role.instance.arn]
    }
    condition {
      test     = "StringEquals"
      variable = "kms:EncryptionContext:volume"
      values   = [var.name]
    }
  }
  statement {
    sid       = "EncryptSecret"
    actions   = ["kms:Encrypt"]
    resources = ["*"]
    principals {
      type        = "AWS"
      identifiers = [data.aws_iam_role.provisioner.arn]
    }
    condition {
      test     = "StringEquals"
      variable = "kms:EncryptionContext:volume"
      values   = [var.name]
    }
  }
}

resource "aws_kms_key" "volume" {
  description         = "Encrypts the secret of the nbdcrypt volume ${var.name}"
  enable_key_rotation = true
  policy              = data.aws_iam_policy_document.key.json

  # Without the key, the volumes are lost.
  lifecycle {
    prevent_destroy = true
  }
}

# The alias is for people. The configuration names the key by its ARN. Otherwise anyone who may move the alias could choose
# the key.
resource "aws_kms_alias" "volume" {
  name          = "alias/nbdcrypt-${var.name}"
  target_key_id = aws_kms_key.volume.key_id
}

resource "aws_s3_bucket" "secret" {
  bucket_prefix = "nbdcrypt-"

  # Without the ciphertext, the volumes are lost.
  lifecycle {
    prevent_destroy = true
  }
}

# Versions are kept. If the object is ever replaced or deleted, the old ciphertext can be restored, and opens the old volumes
# again.
resource "aws_s3_bucket_versioning" "secret" {
  bucket = aws_s3_bucket.secret.id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "secret" {
  bucket = aws_s3_bucket.secret.id
  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

resource "aws_s3_bucket_ownership_controls" "secret" {
  bucket = aws_s3_bucket.secret.id
  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_public_access_block" "secret" {
  bucket                  = aws_s3_bucket.secret.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

data "aws_iam_policy_document" "bucket" {
  statement {
    sid       = "DenyWithoutTls"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.secret.arn, "${aws_s3_bucket.secret.arn}/*"]
    principals {
      type        = "*"
      identifiers = ["*"]
    }
    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }
}

resource "aws_s3_bucket_policy" "secret" {
  bucket = aws_s3_bucket.secret.id
  policy = data.aws_iam_policy_document.bucket.json
}

data "aws_iam_policy_document" "instance" {
  statement {
    sid       = "ReadCiphertext"
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.secret.arn}/${var.name}"]
  }
  statement {
    sid       = "UnlockVolume"
    actions   = ["kms:Decrypt"]
    resources = [aws_kms_key.volume.arn]
    condition {
      test     = "StringEquals"
      variable = "kms:EncryptionContext:volume"
      values   = [var.name]
    }
  }
}

resource "aws_iam_role_policy" "instance" {
  name   = "nbdcrypt-${var.name}"
  role   = aws_iam_role.instance.id
  policy = data.aws_iam_policy_document.instance.json
}

data "aws_iam_policy_document" "provisioner" {
  statement {
    sid       = "StoreCiphertext"
    actions   = ["s3:PutObject"]
    resources = ["${aws_s3_bucket.secret.arn}/${var.name}"]
  }
  statement {
    sid       = "EncryptSecret"
    actions   = ["kms:Encrypt"]
    resources = [aws_kms_key.volume.arn]
    condition {
      test     = "StringEquals"
      variable = "kms:EncryptionContext:volume"
      values   = [var.name]
    }
  }
}

resource "aws_iam_role_policy" "provisioner" {
  name   = "nbdcrypt-${var.name}-provision"
  role   = data.aws_iam_role.provisioner.id
  policy = data.aws_iam_policy_document.provisioner.json
}

locals {
  # The section `[key]` of the configuration. The key's ARN says in which region KMS is asked.
  key = <<-END
    source = "aws"
    object = "s3://${aws_s3_bucket.secret.id}/${var.name}"
    kms-key = "${aws_kms_key.volume.arn}"
    encryption-context = { volume = "${var.name}" }
    random = true
  END
}

resource "aws_launch_template" "instance" {
  name_prefix   = "nbdcrypt-"
  image_id      = var.image_id
  instance_type = var.instance_type
  iam_instance_profile {
    arn = aws_iam_instance_profile.instance.arn
  }
  metadata_options {
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }
  user_data = base64encode(templatefile("${path.module}/user-data.yaml.tftpl", { name = var.name, key = local.key }))
}
