{{/* The value of app.kubernetes.io/name. */}}
{{- define "purelb.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/*
The labels of an object. Called with {root, component}; an object of the whole release has the component "".
Those of PureLB's manifest (app, component) and those of its chart stand side by side.
*/}}
{{- define "purelb.labels" -}}
{{- with .root -}}
app: purelb
app.kubernetes.io/name: {{ include "purelb.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- if not .Values.plainManifest }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- with .component }}
component: {{ . }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/*
The labels that select a workload's Pods. Called with {root, component}.
Selectors cannot be changed, so these are those of PureLB's chart, or of its manifest: an installation is taken over in place.
*/}}
{{- define "purelb.selectorLabels" -}}
{{- if .root.Values.plainManifest -}}
app: purelb
component: {{ .component }}
{{- else -}}
app.kubernetes.io/name: {{ include "purelb.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}
{{- end }}

{{/* Name, namespace and labels of an object of a workload. Called with {root, component, name}. */}}
{{- define "purelb.metadata" -}}
name: {{ .name | default .component }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "purelb.labels" . | nindent 2 }}
{{- end }}

{{/* The image of a workload. Called with {root, component}. */}}
{{- define "purelb.image" -}}
{{- with .root -}}
image: {{ printf "%s/%s:%s" .Values.image.repository $.component (.Values.image.tag | default .Chart.AppVersion | toString) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}
{{- end }}

{{/* The probes of a workload. */}}
{{- define "purelb.probes" -}}
{{- if .Values.probes.enabled -}}
livenessProbe:
  httpGet:
    path: /healthz
    port: metrics
readinessProbe:
  httpGet:
    path: /readyz
    port: metrics
  periodSeconds: 5
{{- end }}
{{- end }}

{{/* Whether an LBNodeAgent needs fields of purelb.io/v2: "true" or "". */}}
{{- define "purelb.v2Agent" -}}
{{- with .Values.lbnodeagent -}}
{{- if or .localInterface .dummyInterface .garpConfig .addressConfig }}true{{ end }}
{{- end }}
{{- end }}
