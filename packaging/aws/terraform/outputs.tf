output "key" {
  description = "The part `[key]` of the configuration for `nbdcrypt provision`."
  value       = local.key
}

output "role_name" {
  value = aws_iam_role.instance.name
}

output "launch_template_id" {
  value = aws_launch_template.instance.id
}
