variable "name" {
  type        = string
  description = "The volume's name. It becomes part of the alias, of the object's key and of the mountpoint /mnt/NAME."
  default     = "scratch"
  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$", var.name))
    error_message = "A volume's name has 1 to 64 of A-Z a-z 0-9 _ -, and does not start with a dash."
  }
}

variable "provisioner_role" {
  type        = string
  description = "The name of the role that runs `nbdcrypt provision`. It must exist."
}

variable "image_id" {
  type        = string
  description = "An image in which the nbdcrypt package is installed."
}

variable "instance_type" {
  type        = string
  description = "An instance type with an instance store, for the image's architecture."
  default     = "m6id.large"
}
