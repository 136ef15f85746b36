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

{{/* The name of an image: REPOSITORY/NAME:TAG, and @DIGEST where there is one. Called with {root, component}. */}}
{{- define "purelb.imageName" -}}
{{- with .root.Values.image -}}
{{ .repository }}/{{ $.component }}:{{ .tag | default $.root.Chart.AppVersion }}
{{- with get (.digest | default dict) $.component }}@{{ . }}{{ end }}
{{- end }}
{{- end }}

{{/* The image of a workload. Called with {root, component}. */}}
{{- define "purelb.image" -}}
image: {{ include "purelb.imageName" . | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- end }}

{{/* The probes of a workload, on a port of their own. Called with {root, host}: in the host's network that is 127.0.0.1. */}}
{{- define "purelb.probes" -}}
{{- if .root.Values.probes.enabled -}}
livenessProbe:
  httpGet:
    {{- with .host }}
    host: {{ . }}
    {{- end }}
    path: /healthz
    port: 7936
readinessProbe:
  httpGet:
    {{- with .host }}
    host: {{ . }}
    {{- end }}
    path: /readyz
    port: 7936
  periodSeconds: 5
{{- end }}
{{- end }}

{{/* Has /metrics served to those whom the API server lets. */}}
{{- define "purelb.metricsAuth" -}}
{{- if .Values.Prometheus.auth.enabled -}}
- name: PURELB_METRICS_AUTH
  value: "true"
{{- end }}
{{- end }}

{{/* Whether an LBNodeAgent needs fields of purelb.io/v2: "true" or "". */}}
{{- define "purelb.v2Agent" -}}
{{- with .Values.lbnodeagent -}}
{{- if or .localInterface .dummyInterface .garpConfig .addressConfig }}true{{ end }}
{{- end }}
{{- end }}

{{/* The annotations of what runs before an installation or upgrade. Called with the order, as a string. */}}
{{- define "purelb.crdsHook" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/*
The rest of the spec of a Pod that runs the allocator's program for an errand, where the allocator itself may run.
Called with {root, name, command}.
*/}}
{{- define "purelb.errand" -}}
{{- with .root.Values.imagePullSecrets -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{ end -}}
nodeSelector:
  {{- mustMerge (dict "kubernetes.io/os" "linux") (.root.Values.allocator.nodeSelector | default dict) | toYaml | nindent 2 }}
{{- with .root.Values.allocator.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.allocator.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: {{ .name }}
    {{- include "purelb.image" (dict "root" .root "component" "allocator") | nindent 4 }}
    args: {{ toJson .command }}
    env:
      - name: PURELB_NAMESPACE
        valueFrom:
          fieldRef:
            fieldPath: metadata.namespace
      - name: PURELB_LOG_LEVEL
        value: {{ .root.Values.logLevel | quote }}
    {{- with .root.Values.allocator.resources }}
    resources:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .root.Values.allocator.containerSecurityContext }}
    securityContext:
      {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end }}

{{/* Refuses a second release: two ledgers would give out the same addresses. Helm's own words would be about a ClusterRole. */}}
{{- define "purelb.onlyRelease" -}}
{{- $role := lookup "rbac.authorization.k8s.io/v1" "ClusterRole" "" "purelb:allocator" -}}
{{- $annotations := dig "metadata" "annotations" dict $role | default dict -}}
{{- $name := get $annotations "meta.helm.sh/release-name" -}}
{{- $namespace := get $annotations "meta.helm.sh/release-namespace" -}}
{{- if and $name (or (ne $name .Release.Name) (ne $namespace .Release.Namespace)) -}}
{{- fail (printf "this cluster has it already, as release %s in namespace %s, and two would give out the same addresses: upgrade that one (helm upgrade %s --namespace %s), or uninstall it first" $name $namespace $name $namespace) -}}
{{- end -}}
{{- end }}
